#!/usr/bin/env bash
# Everything a GPU machine should be asked, in one command, in 10 minutes, without a network:
#
#     OUT=results BUDGET=570 COMMIT=$(git rev-parse --short=10 HEAD) bench/gpu.sh
#     OUT=more bench/gpu.sh kernels "tuned example"     # or just these sections
#
# Needs Python with torch, triton and numpy; pytest, tyro, DALI and Pillow where they are. First the tests, and beside them, on
# the other cores, most of what is timed later is compiled. Each section has a time limit and costs nothing but itself
# when it fails; the most wanted come first. $OUT gets log.txt, tests.txt, JSON files and the profile.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${OUT:-gpu-results}
BUDGET=${BUDGET:-570}
PYTHON=${PYTHON:-$(command -v python3 || echo python)}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export OUT PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/fastdcgan-inductor}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/fastdcgan-triton}
work=$(mktemp -d)
export work
trap 'rm -rf "$work"' EXIT

asked=("$@")
known=$(grep -oE '^ *section ("[^"]+"|[a-z]+)' bench/gpu.sh | sed -E 's/^ *section "?([^"]+)"?/\1/')
for each in "${asked[@]}"; do
    grep -qxF -- "$each" <<< "$known" || { echo "there is no section '$each'; these are:"; echo "$known"; exit 2; } >&2
done

# wanted NAME: whether this section was asked for, or none was by name.
wanted() {
    local each
    for each in "${asked[@]}"; do [ "$each" = "$1" ] && return 0; done
    [ ${#asked[@]} -eq 0 ]
}

# section NAME LIMIT COMMAND...: run it for at most LIMIT seconds, or what is left of the budget.
section() {
    local name=$1 limit=$2 left=$((BUDGET - SECONDS))
    shift 2
    wanted "$name" || return
    if [ "$left" -lt 15 ]; then
        echo "== $name: skipped, no time left" | tee -a "$OUT/log.txt"
        return
    fi
    [ "$limit" -gt "$left" ] && limit=$left
    echo "== $name (at most $limit s)" | tee -a "$OUT/log.txt"
    local start=$SECONDS
    timeout -s INT -k 10 "$limit" "$@" 2>&1 | tee -a "$OUT/log.txt"  # interrupted, Python says where, pytest what failed
    echo "== $name: exit ${PIPESTATUS[0]} after $((SECONDS - start)) s" | tee -a "$OUT/log.txt"
}

# steps FILE SIDE REPETITIONS "BATCHES" "CONTENDERS": bench of the step, as `fastdcgan bench` without its command line.
steps() {
    cat <<PYTHON_END
import os
from pathlib import Path
import torch
from fastdcgan.bench.contenders import Shape
from fastdcgan.bench.throughput import bench
bench(
    shape=Shape(image_size=($2, $2)), batch_sizes=tuple(map(int, "$4".split())), device=torch.device("cuda"),
    names=tuple("$5".split()), repetitions=$3, block_seconds=0.3, json=Path(os.environ["OUT"], "$1.json"),
    command="fastdcgan bench --image-size $2 --batch-size $4 --only $5 --repetitions $3 --block-seconds 0.3",
)
PYTHON_END
}

has() { "$PYTHON" -c "import $1" 2>/dev/null; }

section machine 20 bash -c "nvidia-smi; $PYTHON -c 'import torch, triton; print(torch.__version__, triton.__version__)'"

# Tests and compilation at once. Every test's name and result goes to tests.txt as it ends, so a cut run still tells.
if wanted tests; then
    for batch in 128 1024; do
        timeout 100 "$PYTHON" - $batch > "$work/compile-$batch.txt" 2>&1 <<'PYTHON_END' &
import sys, torch
from fastdcgan.bench.contenders import Entry, Shape, on_random_images, quiet_compiler
quiet_compiler()
run, _ = on_random_images(Entry("fast-captured", "bf16"), Shape(int(sys.argv[1])), torch.device("cuda"))
for _ in range(4):
    run()
PYTHON_END
    done
    for batch in 64 128 1024; do  # timed again below, alone
        timeout 110 "$PYTHON" -m fastdcgan.bench.kernels_table --batches $batch --json "$work/kernels-$batch.json" \
            > "$work/kernels-$batch.txt" 2>&1 &
    done
    wanted cuts && timeout 110 "$PYTHON" -m fastdcgan.bench.batch_norm_cuts > /dev/null 2>&1 &
    if has pytest; then
        section tests 120 bash -c "set -o pipefail; $PYTHON -m pytest -v -rf -m gpu -o addopts=--import-mode=importlib \
            -p no:cacheprovider $(has xdist && echo '-n 6') --continue-on-collection-errors \
            tests/test_executors.py tests/test_step.py tests/bench tests/data tests/kernels > \$OUT/tests.txt 2>&1; code=\$?; \
            grep -E '^(FAILED|ERROR)|passed|failed' \$OUT/tests.txt | tail -40; exit \$code"
    else
        echo "== tests: skipped, no pytest here" | tee -a "$OUT/log.txt"
    fi
    wait
fi

section "step 64 pixels" 150 "$PYTHON" -c "$(steps step-64 64 7 "128 1024" "example example-fp32 fast-captured")"
section profile 60 "$PYTHON" - <<'PYTHON_END'
import os, shutil, traceback
from pathlib import Path
import torch
from fastdcgan.bench.profiling import profile_training
for batch in (128, 1024):
    try:
        profile_training(
            data="fake", image_size=(64, 64), batch_size=batch, width=64, precision="bf16", device=torch.device("cuda"),
            executor="fast-captured", steps=5, out=Path(os.environ["work"], "profile", str(batch)), nsight=False,
        )
    except Exception:  # the other one's profile, and what there is of this one, are still wanted
        traceback.print_exc()
shutil.make_archive(str(Path(os.environ["OUT"], "profile")), "gztar", Path(os.environ["work"], "profile"))
PYTHON_END
if has PIL && has torchvision && { wanted decoding || wanted feeding || wanted "data path"; }; then
    has nvidia.dali || echo "== no DALI here: the data path is measured with the torch loader alone" | tee -a "$OUT/log.txt"
    "$PYTHON" - <<'PYTHON_END'
import os
from pathlib import Path
import torch
from PIL import Image
for name, count, links, coarse, size in (("synthetic-218x178", 256, 31, 12, (218, 178)), ("synthetic-768x512", 256, 15, 96, (512, 768))):
    folder = Path(os.environ["work"], name)  # the larger ones a GPU decodes, where DALI is
    folder.mkdir()
    for i in range(count):
        noise = torch.rand(1, 3, coarse, coarse) * 255
        smooth = torch.nn.functional.interpolate(noise, size, mode="bicubic").clamp(0, 255)
        Image.fromarray(smooth[0].byte().permute(1, 2, 0).numpy()).save(folder / f"{i}.jpg", quality=90)
        for copy in range(links):
            os.link(folder / f"{i}.jpg", folder / f"{i}-{copy}.jpg")
PYTHON_END
    section feeding 90 "$PYTHON" -m fastdcgan.bench.feeding --rounds 5 --block-seconds 0.3 --data "$work/synthetic-218x178" \
        --json "$OUT/feeding.json"
fi
if has tyro; then  # the product as a user runs it: train, go on, draw
    section train 60 bash -c "$PYTHON -m fastdcgan train digits --compile --steps 1000 --run-dir \$work/run --log-every 200 &&
        $PYTHON -m fastdcgan train --run-dir \$work/run --resume --steps 1200 &&
        $PYTHON -m fastdcgan sample \$work/run --count 64 --out \$OUT/digits.png && tail -2 \$work/run/metrics.jsonl"
else
    echo "== train: skipped, no tyro here" | tee -a "$OUT/log.txt"
fi
section kernels 90 "$PYTHON" -m fastdcgan.bench.kernels_table --batches 1024 128 64 --json "$OUT/kernels.json"
section "discriminator memory" 60 "$PYTHON" -m fastdcgan.bench.discriminator_memory --json "$OUT/discriminator-memory.json"
# Trying all ways to convolve, one after the other, takes max-autotune minutes.
section "tuned example" 280 "$PYTHON" -c "$(steps step-64-tuned 64 5 "128" "example skilled fast-captured")"
section cuts 150 "$PYTHON" -m fastdcgan.bench.batch_norm_cuts --json "$OUT/cuts.json"
section "kernels, two groups" 40 "$PYTHON" -m fastdcgan.bench.kernels_table --batches 256 2048 --image-sizes 64 --groups 2 \
    --json "$OUT/kernels-groups-2.json"
section "step 32 pixels" 40 "$PYTHON" -c "$(steps step-32 32 7 "128 1024" "example fast-compiled fast-captured")"
section "step 128 pixels" 50 "$PYTHON" -c "$(steps step-128 128 7 "64 128" "example fast-compiled fast-captured")"
if has PIL && has torchvision; then
    for device in cuda cpu; do
        section decoding 60 "$PYTHON" -m fastdcgan.bench.data_path --data "$work/synthetic-768x512" --images 2048 --rounds 3 \
            --batch-size 128 --device $device --json "$OUT/decoding-$device.json"
    done
    section "data path" 60 "$PYTHON" -c "$(cat <<'PYTHON_END'
import os
from pathlib import Path
import torch
from fastdcgan.bench.contenders import Shape
from fastdcgan.bench.end_to_end import bench_data
bench_data(
    data=Path(os.environ["work"], "synthetic-218x178"), shape=Shape(), batch_sizes=(128,), device=torch.device("cuda"),
    names=("example", "fast-captured"), json=Path(os.environ["OUT"], "data.json"),
    command="fastdcgan bench --data DIR --batch-size 128",
)
PYTHON_END
)"  # not from standard input, which the contenders' processes could not read again
fi
if has scipy; then
    section quality 100 "$PYTHON" -m fastdcgan.bench.quality "$OUT/quality.json" "$(has sklearn && echo digits || echo fake)" \
        32 32 2000 2
else
    echo "== quality: skipped, no scipy here" | tee -a "$OUT/log.txt"
fi
echo "== done after $SECONDS s; in $OUT: $(ls "$OUT" | tr '\n' ' ')" | tee -a "$OUT/log.txt"
