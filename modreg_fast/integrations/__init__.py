"""Callbacks that measure a model every few epochs and log what they find; one module a trainer, imported by its name.

``modreg_fast.integrations.lightning``, ``.transformers``, ``.mmengine``; none is imported with the package."""
