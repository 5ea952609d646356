#!/usr/bin/env python3
"""Frames of a video side by side in one picture, as the README shows the demo's.

python tools/frames.py output/video/wan2.2_t2v_00001_.mp4 docs/images/demo.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import av
import typer
from PIL import Image


def main(
    video: Annotated[Path, typer.Argument(exists=True, help="Anything that PyAV reads.")],
    picture: Annotated[Path, typer.Argument(help="The picture to write.")],
    count: Annotated[
        int, typer.Option(min=1, help="Frames, evenly over the video, its first and last among them.")
    ] = 6,
    scale: Annotated[int, typer.Option(min=1, help="How much larger than the video.")] = 2,
) -> None:
    with av.open(str(video)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    width, height = (scale * side for side in frames[0].size)
    strip = Image.new("RGB", (count * width, height))
    for place in range(count):
        frame = frames[round(place * (len(frames) - 1) / max(1, count - 1))]
        strip.paste(frame.resize((width, height), Image.Resampling.LANCZOS), (place * width, 0))
    strip.save(picture)


if __name__ == "__main__":
    typer.run(main)
