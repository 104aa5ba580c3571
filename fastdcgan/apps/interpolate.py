"""Walks through the latent space, as an animation or a strip of pictures."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from fastdcgan.apps.endpoints import image_files, open_points
from fastdcgan.apps.latent import generate, walk
from fastdcgan.apps.pictures import opaque, save, sheet, to_picture
from fastdcgan.console import say
from fastdcgan.errors import UserError, check_at_least
from fastdcgan.files import check_name, check_out, printable

KINDS = (".gif", ".mp4", ".png")
FRAME = 128  # pixels: smaller pictures are enlarged in animations
FRAMES_PER_SECOND = 20
HOLD = 10  # frames that an animation rests at each of its points


def interpolate(
    run: Path,
    points: list[str],
    *,
    out: Path,
    steps: int = 32,
    truncation: float | None = None,
    fit: bool = False,
) -> None:
    """Walk from each point to the next on the sphere: .gif and .mp4 return to the first, .png has a row for each way.

    Args:
        points: seeds or image files, at least two.
        steps: pictures from each point to the next.

    Raises:
        UserError: points or a run that cannot be used, an --out of another kind, an .mp4 where there is no ffmpeg.
    """
    if len(points) < 2:
        raise UserError("a walk needs at least two points: --seeds 1,2,3")
    check_at_least("--steps", steps, 2)
    check_name(out, KINDS, image_files(points))
    kind = out.suffix.lower()
    if kind == ".mp4" and shutil.which("ffmpeg") is None:
        raise UserError(f"--out {out}: there is no ffmpeg here to write MP4; install it, or end the name in .gif")
    animated = kind != ".png"
    generator, latent = open_points(run, [*points, points[0]] if animated else points, truncation=truncation, fit=fit)
    check_out(out, KINDS)
    images = generate(generator, walk(latent, steps)).cpu()
    if not animated:
        rows = [list(images[first : first + steps + 1]) for first in range(0, len(images) - 1, steps)]
        save(sheet(rows), out)
    else:
        times = max(1, -(-FRAME // min(images.shape[2:])))
        size = images.shape[3] * times, images.shape[2] * times
        frames = [
            opaque(to_picture(image)).convert("RGB").resize(size, Image.Resampling.NEAREST) for image in images[:-1]
        ]
        held = [frame for i, frame in enumerate(frames) for _ in range(HOLD if i % steps == 0 else 1)]
        save(gif(frames, steps) if kind == ".gif" else mp4(held), out)
    say(f"{len(images) - animated} pictures: {printable(out)}")


def gif(frames: list[Image.Image], steps: int) -> bytes:
    """An endless animation; every `steps`-th frame, which is one of the points, stays a little.

    Raises:
        UserError: frames are the same for longer than the format can say.
    """
    content = io.BytesIO()
    frame = round(1000 / FRAMES_PER_SECOND)
    durations = [frame * (HOLD if i % steps == 0 else 1) for i in range(len(frames))]
    try:
        frames[0].save(
            content, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True
        )
    except (OverflowError, struct.error):  # Pillow joins equal frames, and a time has 16 bits
        raise UserError(
            "a GIF shows one picture for 11 minutes at most, and this walk stays longer: give fewer --steps"
        ) from None
    return content.getvalue()


def mp4(frames: list[Image.Image]) -> bytes:
    """H.264 in MP4, made by ffmpeg.

    Raises:
        UserError: ffmpeg fails.
    """
    width, height = frames[0].size
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "walk.mp4"
        raw = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {FRAMES_PER_SECOND} -i -".split()
        encode = ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-pix_fmt", "yuv420p", "-movflags", "+faststart", str(path)]
        command = ["ffmpeg", "-loglevel", "error", *raw, *encode]
        done = subprocess.run(command, input=b"".join(frame.tobytes() for frame in frames), capture_output=True)
        if done.returncode != 0:
            reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise UserError(f"ffmpeg cannot write the film ({' '.join(reason)}); end the name in .gif instead")
        return path.read_bytes()
