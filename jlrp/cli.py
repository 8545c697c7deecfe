"""The command line: explain, inspect, show, export."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import reduce, wraps
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
import tensorstore as ts

import jlrp
from jlrp import jobs
from jlrp.fields import Option, options_of
from jlrp.jobs import pictures
from jlrp.options import InspectOptions, Options
from jlrp.typing import PyTree

Words = Mapping[str, Any]  # of the command line, as click reads them
Command = Callable[..., None]
Decorator = Callable[[Command], Command]


def _sayable(kind: type) -> dict[str, Option[object, object]]:
    """The options that a command line can say."""
    return {n: o for n, o in options_of(kind).items() if o.brief is not None}


def _in_turn(options: Iterable[Decorator]) -> Decorator:
    """Several options, in the order of the command's help."""

    def decorate(command: Command) -> Command:
        return reduce(lambda made, option: option(made), reversed([*options]), command)

    return decorate


def _click_option(name: str, option: Option[object, object]) -> Decorator:
    """None where it is not given: an explainer has options of its own."""
    default = f"  [default: {option.default}]" if option.default else ""
    several = isinstance(option.default, tuple)
    return click.option(
        f"--{name.replace('_', '-')}",
        type=click.Choice(option.choices) if option.choices else option.word,
        multiple=several,
        metavar="GLOB" if several else None,
        help=f"{option.brief}{default}",
    )


def _given(kind: type, words: Words) -> dict[str, Any]:
    """The options of that kind that were given."""
    return {n: words[n] for n in _sayable(kind) if words[n] not in (None, "", ())}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(jlrp.__version__, package_name="jlrp")
def main() -> None:
    """Layer-wise Relevance Propagation for JAX programs.

    FUNCTION is package.module:name, found from the current folder: a function
    fn(params, x) over a batch, or what jlrp.explain made of one.
    """


def _reports(command: Command) -> Command:
    """Errors of jlrp in one line, and exit code 1."""

    @wraps(command)
    def run(*args: object, **kwargs: object) -> None:
        try:
            command(*args, **kwargs)
        except jlrp.JlrpError as error:
            text = " ".join(str(error).split())
            if kwargs.get("params", "") is None and "params = {}" in text:
                text += " No --params was given: give the file of the parameters."
            raise click.ClickException(text) from error
        except KeyboardInterrupt:
            raise click.ClickException(
                "interrupted; what was reported as done is safe, go on with --resume"
            ) from None

    return run


_PARAMS = click.option("--params", help="Orbax folder, .msgpack, .safetensors or .npz.")


def _options_of(kind: type) -> Decorator:
    options = (_click_option(n, option) for n, option in _sayable(kind).items())
    return _in_turn([_PARAMS, *options])


_STEP_OPTIONS = _in_turn(
    [
        click.option(
            "--reduce",
            metavar="HOW",
            help="channels: summed over the last axis; top:K: the K largest.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["float16", "float32", "float64"]),
            default="float32",
            show_default=True,
            help="Of the results.",
        ),
        click.option(
            "--allow-nan",
            is_flag=True,
            help="Explain examples with NaN too: FUNCTION replaces it.",
        ),
    ]
)


@main.command()
@click.argument("function", required=False)
@_options_of(Options)
@_STEP_OPTIONS
@click.option("--artifact", type=click.Path(), help="Instead of FUNCTION: see export.")
@click.option(
    "--data",
    required=True,
    help=".npy file, Zarr array, or package.module:name of a source.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of the results, a Zarr store.",
)
@click.option("--target", help="A class index, or a .npy file with one per example.")
@click.option("--batch", default=64, show_default=True, help="Examples per step.")
@click.option(
    "--buckets", metavar="N,N,...", help="Lengths that ragged examples are padded to."
)
@click.option("--pad", default=0, show_default=True, help="The number to pad with.")
@click.option(
    "--compression",
    type=click.Choice(["zstd", "gzip", "none"]),
    default="zstd",
    show_default=True,
)
@click.option(
    "--on-failure",
    type=click.Choice(jobs.ON_FAILURE),
    default="stop",
    show_default=True,
    help="At an example that cannot be explained.",
)
@click.option("--resume", is_flag=True, help="Go on with an interrupted job.")
@click.option(
    "--devices",
    type=click.Choice(["data"]),
    help="data: divide batches over all devices of this process.",
)
@click.option("--part", metavar="I/N", help="Do part I (from 0) of N alone.")
@click.option(
    "--distributed",
    is_flag=True,
    help="Call jax.distributed.initialize() first (SLURM, TPU pods).",
)
@click.option("--quiet", is_flag=True, help="No progress bar.")
@_reports
def explain(function: str | None, **options: Any) -> None:
    """Explain all examples of a data set, and write a Zarr store.

    \b
    jlrp explain models:cnn --params cnn.npz --data x.npy --out r.zarr --batch 256
    """
    if (function is None) == (options["artifact"] is None):
        raise click.UsageError("Give either FUNCTION or --artifact.")
    if options["distributed"]:
        _join_processes()
    if function is None:
        refused = [*_given(Options, options)]
        refused += [n for n in ("reduce", "allow_nan") if options[n]]
        if refused:
            option = refused[0].replace("_", "-")
            raise click.UsageError(f"An artifact has its --{option} in it.")
        explainer: jlrp.Explainer | jobs.Artifact = jobs.load_artifact(
            options["artifact"]
        )
    else:
        explainer = _explainer(function, options)
    buckets = options["buckets"] and _buckets(options["buckets"], options["pad"])
    done = jobs.run(
        explainer,
        _params(options["params"]),
        _source(options["data"]),
        options["out"],
        target=_target(options["target"]),
        batch=options["batch"],
        buckets=buckets,
        reduce=_reduction(options["reduce"]),
        dtype=options["dtype"],
        allow_nan=options["allow_nan"],
        compression=options["compression"],
        on_failure=options["on_failure"],
        resume=options["resume"],
        devices=options["devices"],
        part=_part(options["part"]),
        progress=not options["quiet"],
    )
    click.echo(str(done))


@main.command()
@click.argument("function")
@_options_of(InspectOptions)
@click.option("--shape", required=True, help="Of a batch, such as 1,28,28,1.")
@click.option("--target", type=int, help="A class index.")
@click.option("--dtype", default="float32", show_default=True, help="Of the input.")
@_reports
def inspect(
    function: str, shape: str, dtype: str, target: int | None, **options: Any
) -> None:
    """Print the rule of every operation of a function; nothing is computed."""
    fn = _imported(function)
    fn = fn.fn if isinstance(fn, jlrp.Explainer) else fn
    params, x = _params(options["params"]), _spec(shape, dtype)
    given = _given(InspectOptions, options)
    click.echo(jlrp.inspect(fn, params, x, target, **given))


@main.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("index", type=int)
@click.option("--output", type=click.Path(path_type=Path), help="Write a PNG instead.")
@click.option("--data", help="The source, to show its tokens in a strip.")
@_reports
def show(store: Path, index: int, output: Path | None, data: str | None) -> None:
    """Show the relevance of one example: a heat map, or a strip of tokens."""
    row = pictures.load_example(store, index)
    click.echo(pictures.heading(index, row))
    for name, relevance in pictures.relevances(row).items():
        if output is not None:
            path = (
                output
                if name == "relevance"
                else output.with_stem(f"{output.stem}.{name}")
            )
            pictures.write_png(relevance, path)
            click.echo(f"wrote {path}")
            continue
        tokens = None if data is None else np.asarray(_source(data)[index]).tolist()
        click.echo(f"{name}:\n{pictures.terminal(relevance, tokens)}", color=True)


@main.command()
@click.argument("function")
@_options_of(Options)
@_STEP_OPTIONS
@click.option("--shape", required=True, help="Of one example, such as 28,28,1.")
@click.option(
    "--input-dtype", default="float32", show_default=True, help="Of the input."
)
@click.option("--target", type=int, help="A class index for all examples.")
@click.option("--labels", is_flag=True, help="Take a class index for each example.")
@click.option("--out", required=True, type=click.Path(), help="The file to write.")
@_reports
def export(function: str, **options: Any) -> None:
    """Write the explanation function to a file of jax.export.

    It takes batches of any size, and runs without the model's code:

    \b
    jlrp export models:cnn --params cnn.npz --shape 28,28,1 --out cnn.jlrp
    jlrp explain --artifact cnn.jlrp --params cnn.npz --data x.npy --out r.zarr
    """
    jobs.export_artifact(
        _explainer(function, options),
        _params(options["params"]),
        _spec(options["shape"], options["input_dtype"]),
        options["out"],
        labels=options["labels"],
        reduce=_reduction(options["reduce"]),
        dtype=options["dtype"],
        allow_nan=options["allow_nan"],
    )
    click.echo(f"wrote {options['out']}")


def _join_processes() -> None:
    try:
        jax.distributed.initialize()
    except Exception as error:
        raise jobs.JobError(
            f"jax.distributed found no cluster to join: {error} Run under SLURM, "
            "MPI or on a TPU pod, or give each process its --part."
        ) from error


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise jobs.JobError(f"{name!r} is not of the form package.module:name.")
    if os.getcwd() not in sys.path:  # as with python -m
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise jobs.JobError(
            f"{name} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    return found


def _explainer(function: str, options: Words) -> jlrp.Explainer:
    fn = _imported(function)
    given = _given(Options, options)
    if isinstance(fn, jlrp.Explainer):
        if given:
            raise jobs.JobError(
                f"{function} is an explainer, which has its {next(iter(given))} "
                "already; leave the option out."
            )
        return fn
    if not callable(fn):
        raise jobs.JobError(f"{function} is a {type(fn).__name__}, not a function.")
    target = options["target"]
    fixed = target if isinstance(target, int) else None
    return jlrp.explain(fn, target=fixed, **given)


def _params(path: str | None) -> PyTree:
    return {} if path is None else jobs.load_params(path)


def _source(data: str) -> Any:
    path = Path(data)
    if not path.exists() and ":" in data:
        found = _imported(data)
        return found() if callable(found) else found
    try:
        if path.is_dir():
            driver = "zarr3" if (path / "zarr.json").exists() else "zarr"
            location = {"driver": "file", "path": f"{path.absolute()}/"}
            return ts.open({"driver": driver, "kvstore": location}, open=True).result()
        found = np.load(path, mmap_mode="r")
        return dict(found) if isinstance(found, np.lib.npyio.NpzFile) else found
    except Exception as error:
        raise jobs.JobError(
            f"The data {data} cannot be read: {' '.join(str(error).split())} It is a "
            ".npy or .npz file, a Zarr array, or package.module:name of a source; "
            "examples of many lengths are a list there, with --buckets."
        ) from error


def _target(target: str | None) -> PyTree:
    if target is None or target.lstrip("-").isdecimal():
        return target and int(target)
    return _source(target)


def _reduction(how: str | None) -> Callable[[PyTree], PyTree] | None:
    if how is None:
        return None
    if how == "channels":
        return jobs.sum_channels
    name, _, k = how.partition(":")
    if name == "top" and k.isdecimal():
        return jobs.Top(int(k))
    raise jobs.JobError(f"--reduce is channels or top:K, such as top:16; got {how!r}.")


def _buckets(lengths: str, pad: int) -> jobs.Buckets:
    return jobs.Buckets(_numbers(lengths, "--buckets"), pad)


def _spec(shape: str, dtype: str) -> jax.ShapeDtypeStruct:
    try:
        return jax.ShapeDtypeStruct(_numbers(shape, "--shape"), np.dtype(dtype))
    except TypeError as error:
        raise jobs.JobError(f"{dtype!r} is no dtype.") from error


def _part(part: str | None) -> tuple[int, int] | None:
    if part is None:
        return None
    index, _, parts = part.partition("/")
    if not index.isdecimal() or not parts.isdecimal():
        raise jobs.JobError(f"--part is I/N, such as 0/4; got {part!r}.")
    return int(index), int(parts)


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise jobs.JobError(f"{option} is numbers with commas; got {text!r}.") from None
