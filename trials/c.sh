START=$(date +%s); t() { echo $(( $(date +%s) - START )); }
. .gpu2/setup.sh; P=${P:-python3}; R=/tmp/r; mkdir -p $R; CD=${CD:-/tmp/d/cifar10}; LIMIT=${LIMIT:-196}
export TORCHINDUCTOR_CACHE_DIR=/tmp/c/half-demo/i TRITON_CACHE_DIR=/tmp/c/half-demo/t; echo unpacked $(t)
pack() { tar -C $R -czf $OUT/p.tmp --exclude=checkpoints --exclude=tensorboard --exclude='*.f16' . 2>/dev/null; mv $OUT/p.tmp $OUT/c.tar.gz; }
( while sleep 15; do pack; done ) & BG=$!
date +%s.%N > $R/began
( $P -m reco_fast.train cifar10 --data.path $CD/train --data.val-path $CD/test --loss.mix-share 0.5 --loss.mix-within --loss.keys weak --optim.lr 0.03 --train.epochs ${EP:-150} --eval.every ${EV:-75} --run.log-every ${LOG:-100} --run.dir $R/record $X 2>&1 | $P -uc 'import sys, time; [print(round(time.time(), 1), line, end="", flush=True) for line in sys.stdin]' > $R/record.log; date +%s.%N > $R/ended ) & A=$!
while kill -0 $A 2>/dev/null && [ $(t) -lt $LIMIT ]; do sleep 0.2; done
echo trained $(t); kill -0 $A 2>/dev/null && { pkill -TERM -f reco_fast.train; sleep 4; }; kill $BG; pack
$P .gpu2/half.py $R/record /tmp/w.f16 && split -b 15500000 -d /tmp/w.f16 $OUT/record.f16.; echo weights $(t)
grep -h kNN $R/record.log | cut -c1-100; tail -n 3 $R/record.log | cut -c1-170; ls -la $OUT
