"""Operations: groups of equations that one rule explains, one file a kind."""
