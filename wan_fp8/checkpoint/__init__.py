"""Checkpoints: what a file is, how its tensors are streamed, and how its names become the official ones.

``reader`` opens files and folders without reading weights, ``detect`` says what they are, ``folder`` finds the parts
of a checkpoint folder, ``load`` builds a transformer, ``encoders`` serves text encoder and VAE weights, ``lora`` reads
LoRAs, ``listing`` finds checkpoint folders below a root.
"""
