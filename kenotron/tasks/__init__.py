"""What stands on top of everything: Lightning modules and data modules for common tasks."""

from kenotron.tasks.token_data import TokenData

__all__ = ["TokenData"]
