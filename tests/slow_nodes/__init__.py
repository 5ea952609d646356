"""Nodes for the tests of the headless runner: one that takes as long as it is told, one that fails."""

import time

import comfy.model_management
import comfy.utils


class TestWait:
    """Waits in steps, with progress, and stops when interrupted."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "wait", ("INT",)
    __test__ = False

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"steps": ("INT", {"default": 1, "min": 1, "max": 100000}), "tag": ("STRING", {})}}

    def wait(self, steps, tag):
        progress = comfy.utils.ProgressBar(steps)
        for _ in range(steps):
            comfy.model_management.throw_exception_if_processing_interrupted()
            time.sleep(0.02)
            progress.update(1)
        return (steps,)


class TestFail:
    """Raises what it is told."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "tests", "fail", (), True
    __test__ = False

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"message": ("STRING", {})}, "optional": {"after": ("INT", {"forceInput": True})}}

    def fail(self, message, after=0):
        if message:
            raise ValueError(message)
        return ()


NODE_CLASS_MAPPINGS = {"TestWait": TestWait, "TestFail": TestFail}
NODE_DISPLAY_NAME_MAPPINGS = {"TestWait": "Wait a While", "TestFail": "Fail If Told"}
