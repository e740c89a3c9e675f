"""Commands: ``python -m ipa.tools.<name> key=value …``."""
