"""Operations of the core, each a torch reference beside its kernel."""
