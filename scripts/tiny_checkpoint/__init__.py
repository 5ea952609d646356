"""Small random Wan2.2 checkpoints with the real key names, shapes and folder layouts, for demos and tests.

Depends on torch, safetensors, sentencepiece and tokenizers only: neither the engine nor ComfyUI is imported, so that
both can be tested against what is written here.
"""

from __future__ import annotations
