"""Callbacks that measure a model every few epochs and log what they find; one module a trainer, imported by its name.

``modreg_fast.integrations.lightning``, ``.transformers``, ``.mmengine``; none is imported with the package. Their ``results`` go by the
epoch as the trainer's own log and checkpoints count it: from 0 in Lightning, from 1 in transformers and MMEngine."""
