"""A page for people who use an adapter: ``python -m ipa.tools.app adapter=FILE``."""
