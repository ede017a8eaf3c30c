. .gpu/setup.sh; S=".gpu/shared.sh"; P=python3; mkdir -p $OUT/r /tmp/r /tmp/r/growth; touch /tmp/machine.lock; ln -sf /tmp/machine.lock /tmp/r/growth/machine.lock
pack() { tar -C /tmp/r -czf $OUT/p.tmp . 2>/dev/null && mv $OUT/p.tmp $OUT/part1.tar.gz; }
( while sleep 15; do pack; done ) & BG=$!
M="-m reco_fast.profiling.growth --measure --rounds 3 --steps 10 --output /tmp/r/m"
bash $S $P .gpu/e2e.py --photos /tmp/d/photos --output /tmp/r/e2e.json > /tmp/r/e2e.log 2>&1 & E=$!
bash $S $P $M --model.arch resnet50 --data.image-size 224 --train.batch-size 256 --model.bank-size 65536 --model.key-norm split > /tmp/r/r50-split.log 2>&1 & A=$!
bash $S $P $M --model.arch resnet50 --data.image-size 224 --train.batch-size 256 --model.bank-size 65536 > /tmp/r/r50-batch.log 2>&1 & B=$!
for o in reco moco; do for b in 256 512; do bash $S $P $M --model.arch resnet18 --train.batch-size $b --model.bank-size 4096 --model.key-norm split --loss.objective $o > /tmp/r/r18-$o-$b.log 2>&1 & C="$C $!"; done; done
TORCHINDUCTOR_COMPILE_THREADS=2 $P -m reco_fast.profiling.growth --output /tmp/r/growth --model.arch resnet18 --train.batch-size 512 --model.bank-size 65536 --batches 256 1024 2048 4096 --banks 4096 16384 262144 1048576 --sizes 32 --ranks 1 --rounds 5 --steps 5 > /tmp/r/growth.log 2>&1 & D=$!
wait $E $A $B $C $D; kill $BG; pack
tail -n 1 -q /tmp/r/r50*.log /tmp/r/r18*.log | cut -c1-300; grep -v Warn /tmp/r/e2e.log | tail -15; tail -14 /tmp/r/growth.log | cut -c1-160
