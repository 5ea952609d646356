"""Wan FP8: Wan2.2 video models in ComfyUI, which imports this file at its start: it imports next to nothing itself."""

if __package__:  # False when a tool, such as a test runner, executes this file on its own instead of importing the pack

    async def comfy_entrypoint():
        """What ComfyUI calls to get the nodes; only then are the node modules, and with them the engine, imported."""
        from .nodes import comfy_entrypoint as entrypoint

        return await entrypoint()

    WEB_DIRECTORY = "./web"

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
