. .gpu2/setup.sh; P=${P:-python3}; mkdir -p /tmp/r/runs; START=$(date +%s); LIMIT=${LIMIT:-440}
pack() { tar -C /tmp/r -czf $OUT/p.tmp --exclude=checkpoints --exclude=tensorboard --exclude='*.f16*' . 2>/dev/null && mv $OUT/p.tmp $OUT/part_b.tar.gz; }
( while sleep 12; do pack; done ) & BG=$!
D="--data.path ${CD:-/tmp/d/cifar10}/train --data.val-path ${CD:-/tmp/d/cifar10}/test --data.loader dali --data.workers 5 --run.log-every 100"
R="--train.batch-size 256 $X"
bash .gpu2/shared.sh $P -m reco_fast.train cifar10 $D $R --optim.lr 0.08 --train.epochs ${EP:-100} --eval.every 20 --run.dir /tmp/r/runs/reco > /tmp/r/reco.log 2>&1 & A=$!
bash .gpu2/shared.sh $P -m reco_fast.train cifar10 $D $R --loss.objective moco --optim.lr 0.12 --train.epochs ${ME:-180} --eval.every 36 --run.dir /tmp/r/runs/moco > /tmp/r/moco.log 2>&1 & B=$!
sleep 8; touch /tmp/go
half() { $P .gpu2/half.py /tmp/r/runs/$1 /tmp/r/$1.f16 && split -b 15500000 -d /tmp/r/$1.f16 $OUT/$1.f16. ; }
wait $B; half moco & H=$!; wait $A; half reco; wait $H; pack; echo trained after $(( $(date +%s) - START ))
while pgrep -f e2e.py > /dev/null && [ $(( $(date +%s) - START )) -lt $LIMIT ]; do sleep 1; done
kill $BG; pack; for f in reco moco; do grep epoch /tmp/r/$f.log | grep kNN; tail -n 1 /tmp/r/runs/$f/metrics.jsonl; done; grep -v nvjpeg /tmp/r/e2e.log | cut -c1-200 | tail -12; ls -la $OUT
