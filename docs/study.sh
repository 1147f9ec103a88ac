#!/usr/bin/env bash
# The study on CIFAR-100 (docs/study.md): three seeds of pre-training, fine-tuning and analysis.
#
#     SCALE=cpu bash docs/study.sh  # about five hours of one core: the numbers of docs/study.md
#     SCALE=gpu bash docs/study.sh  # ViT-Tiny on one GPU: nobody has run this yet
#
# Start it in the project's folder. If it was stopped, it continues where it was.
set -eu
SCALE=${SCALE:-cpu}
CIFAR=${CIFAR:-cifar100}  # or a folder of its images, with train/ and val/
RUNS=runs/study-$SCALE
DATA="--data $CIFAR --preset small --download --resume"

if [ "$SCALE" = cpu ]; then
  # A network of 0.7M parameters, patches of 8 pixels, few epochs.
  NET="--arch toy --patch-size 8 --batch-size 128"
  MAE="$NET --epochs 6 --warmup-epochs 1 --base-lr 6e-3"
  MOCO="$NET --epochs 3 --warmup-epochs 1 --base-lr 2e-3 --dim 64 --mlp-dim 256"
  TEACHER="--arch tiny --patch-size 8 --batch-size 128"
  TEACHER="$TEACHER --epochs 12 --warmup-epochs 1 --base-lr 3e-3"
  TUNE="$NET --warmup-epochs 1 --base-lr 4e-3 --randaug 0 --mixup 0 --min-crop 0.5"
  TUNE="$TUNE --eval-every 100"
  SCRATCH="--layer-decay 1.0"  # the recipe of today has 0.85, also from scratch
  ALL="--epochs 2"
  TENTH="--fraction 0.1 --epochs 12"
  HUNDREDTH="--fraction 0.01 --epochs 60"
  LOWER="2 4"  # of 6 blocks
else
  # ViT-Tiny, patches of 4 pixels, the recipe for images of 32 pixels.
  NET="--arch tiny --compile"
  MAE="$NET"
  MOCO="$NET"
  TEACHER="--arch small --decoder-dim 192 --decoder-heads 6 --compile"
  TUNE="$NET --eval-every 10"
  SCRATCH=""
  ALL="--epochs 100"
  TENTH="--fraction 0.1 --epochs 200"
  HUNDREDTH="--fraction 0.01 --epochs 400"
  LOWER="3 6 9"  # of 12 blocks
fi

python mae.py $DATA $TEACHER --out $RUNS/teacher
for seed in 0 1 2; do

  # Pre-training.
  python mae.py $DATA $MAE --seed $seed --out $RUNS/mae-$seed
  python mocov3.py $DATA $MOCO --seed $seed --out $RUNS/moco-$seed
  python distill.py $DATA $MAE --teacher $RUNS/teacher/last.pt --seed $seed \
    --out $RUNS/distill-$seed

  # Fine-tuning on all labels, a tenth, a hundredth (Tables 1, 4, 5).
  for name in scratch mae moco distill; do
    start="--init $RUNS/$name-$seed/last.pt"
    if [ $name = scratch ]; then start=$SCRATCH; fi
    python finetune.py $DATA $TUNE $start $ALL --seed $seed --out $RUNS/$name-all-$seed
    python finetune.py $DATA $TUNE $start $TENTH --seed $seed --out $RUNS/$name-tenth-$seed
    python finetune.py $DATA $TUNE $start $HUNDREDTH --seed $seed \
      --out $RUNS/$name-hundredth-$seed
  done

  # Only the lower blocks are kept (Figures 2, 4).
  for name in mae moco; do
    for kept in 0 $LOWER; do
      python finetune.py $DATA $TUNE --init $RUNS/$name-$seed/last.pt --keep-blocks $kept \
        $TENTH --seed $seed --out $RUNS/$name-kept$kept-tenth-$seed
    done
  done
  for kept in $LOWER; do
    python finetune.py $DATA $TUNE --init $RUNS/mae-$seed/last.pt --keep-blocks $kept \
      $ALL --seed $seed --out $RUNS/mae-kept$kept-all-$seed
  done

  # Layers and attention (Figures 1, 3, 5, 6).
  python analysis.py all scratch=$RUNS/scratch-all-$seed/last.pt MAE=$RUNS/mae-$seed/last.pt \
    MoCo=$RUNS/moco-$seed/last.pt distilled=$RUNS/distill-$seed/last.pt \
    tuned=$RUNS/mae-all-$seed/last.pt random --data $CIFAR --out $RUNS/analysis-$seed
done

# numbers.json: of each run the last top-1 in %, or the last loss of pre-training.
python - $RUNS <<'END'
import json, pathlib, sys
runs = pathlib.Path(sys.argv[1])
numbers = {}
for log in sorted(runs.glob("*/log.jsonl")):
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        numbers[log.parent.name] = round(entry.get("top1", entry.get("loss")), 2)
(runs / "numbers.json").write_text(json.dumps(numbers, indent=1))
END
