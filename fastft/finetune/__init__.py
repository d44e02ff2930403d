"""Fine-tuning: thin glue over the libraries users know, with the models patched."""


class UserError(Exception):
    """Something the user can put right; commands print it without a traceback."""
