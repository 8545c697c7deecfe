"""jlrp: Layer-wise Relevance Propagation for any JAX program."""

from jlrp import composites as composites
from jlrp import rules as rules
from jlrp.api import Explainer as Explainer
from jlrp.api import Explanation as Explanation
from jlrp.api import audit as audit
from jlrp.api import explain as explain
from jlrp.api import inspect as inspect
from jlrp.api import relevance as relevance
from jlrp.composites import Composite as Composite
from jlrp.errors import InputError as InputError
from jlrp.errors import IntegrationError as IntegrationError
from jlrp.errors import JlrpError as JlrpError
from jlrp.errors import JlrpWarning as JlrpWarning
from jlrp.errors import MemoryLimitError as MemoryLimitError
from jlrp.errors import NoRelevanceError as NoRelevanceError
from jlrp.errors import RuleError as RuleError
from jlrp.errors import SelectorError as SelectorError
from jlrp.errors import TargetError as TargetError
from jlrp.errors import UnsupportedPrimitiveError as UnsupportedPrimitiveError
from jlrp.ir.own_primitives import custom_relevance as custom_relevance
from jlrp.ir.own_primitives import tag as tag
from jlrp.plan.residuals import KeepWhere as KeepWhere
from jlrp.references import Background as Background
from jlrp.rules import register_rule as register_rule
from jlrp.rules import unregister_rule as unregister_rule

__version__ = "0.1.0"
