#!/usr/bin/env bash
# Draws the README's pictures of trained models, the probe and the evaluation again: two hours on two cores.
#
#     bench/pictures.sh CIFAR10 DOMAIN PHOTO      # a folder with train/<class>/*.jpg and test/<class>/*.jpg, the
#                                                 # photograph whose style is taken, the photograph that gets it
#
# The runs stay in runs/; stopped, they go on where they were. Needs fastdcgan installed (`.venv/bin/pip install -e .`).
set -euo pipefail
cifar=$(realpath "${1:?name the folder with CIFAR-10}")
domain=$(realpath "${2:?name a photograph of the domain}") photo=$(realpath "${3:?name a photograph to stylize}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
fastdcgan=${FASTDCGAN:-.venv/bin/fastdcgan}
python=${PYTHON:-.venv/bin/python}
run=runs/cifar
out=bench/results/pictures
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

$fastdcgan train "$cifar/train" --image-size 32 --steps 12000 --run-dir $run --resume
$fastdcgan train "$cifar/train/automobile" --image-size 64 --steps 3500 --run-dir runs/automobiles --resume

images=()
for class in airplane automobile bird frog horse ship; do images+=("$cifar/test/$class/0000.jpg"); done
$fastdcgan sample $run --count 36 --out $out/sample.png
$fastdcgan sample runs/automobiles --count 25 --out $out/sample-64.png
$fastdcgan interpolate $run --seeds 3,8 --steps 7 --out $out/interpolate.gif
$fastdcgan arithmetic $run --plus 1,2,3 --minus 4,5,6 --plus 7,8,9 --out $out/arithmetic.png
$fastdcgan invert $run "${images[@]}" --out "$work/invert"
$fastdcgan inpaint $run "${images[@]}" --box 10,10,12,12 --out "$work/inpaint"
$fastdcgan denoise $run "${images[@]}" --sigma 0.1 --add-noise --out "$work/denoise"
for name in invert inpaint denoise; do cp "$work/$name/sheet.png" $out/$name.png; done

$python - "$domain" runs/domain-pieces <<'PYTHON_END'
import sys
from pathlib import Path
from PIL import Image
domain, pieces = Image.open(sys.argv[1]).convert("RGB"), Path(sys.argv[2])
pieces.mkdir(parents=True, exist_ok=True)
for y in range(0, domain.height - 63, 8):
    for x in range(0, domain.width - 63, 8):
        domain.crop((x, y, x + 64, y + 64)).save(pieces / f"{y:04}-{x:04}.png")
PYTHON_END
$fastdcgan train runs/domain-pieces --image-size 64 --steps 3000 --run-dir runs/domain --resume
$fastdcgan sample runs/domain --count 6 --out "$work/drawn"
$fastdcgan stylize runs/domain "$photo" --strength 1 --tiles 12 --out "$work/stylized.png"
$python - "$photo" "$work/drawn" "$work/stylized.png" $out/stylize.png <<'PYTHON_END'
import sys
from pathlib import Path
from PIL import Image
photo, result = Image.open(sys.argv[1]).convert("RGB"), Image.open(sys.argv[3])
width, height = photo.width // 2, photo.height // 2
page = Image.new("RGB", (2 * width + 134, height), "white")
for picture, x in ((photo, 0), (result, width + 134)):
    page.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (x, 0))
for i, drawn in enumerate(sorted(Path(sys.argv[2]).iterdir())):
    page.paste(Image.open(drawn).resize((60, 60)), (width + 6 + i % 2 * 62, i // 2 * 63))
page.save(sys.argv[4])
PYTHON_END

# The settings of the probe were chosen on the 5,000 test images that it takes by itself: here it gets the others.
$python - "$cifar/test" "$work/test-unused" <<'PYTHON_END'
import sys
from pathlib import Path
from fastdcgan.apps.image_sets import shuffled
from fastdcgan.data.source import FolderSource
test = FolderSource(Path(sys.argv[1]))
for i in shuffled(len(test), 0)[5000:]:
    link = Path(sys.argv[2], test.names[i])
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(Path(sys.argv[1], test.names[i]))
PYTHON_END
$fastdcgan probe $run --data "$cifar/train" --test-data "$work/test-unused" --out "$work/probe.json"
$fastdcgan evaluate $run --data "$cifar/train" --out "$work/evaluate.json"
cp "$work"/{probe,evaluate,evaluate-nearest}.png $out/
for name in probe evaluate; do  # without this machine's folders
    sed -e "s|$cifar/|cifar10/|; s|$work/|cifar10/|" "$work/$name.json" > bench/results/$name-cifar10.json
done
