START=$(date +%s); t() { echo $(( $(date +%s) - START )); }
P=${P:-python3}; R=/tmp/r; mkdir -p $R; rm -rf /tmp/tree /tmp/go; cp -r $PWD /tmp/tree; cd /tmp/tree
export OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=6 RECO_FAST_TEST_DATA=/nowhere
. .gpu/setup.sh; export PYTHONPATH=/tmp/tree:/tmp/site RECO_FAST_TEST_DATA=/nowhere; echo unpacked $(t), $(ls /tmp/site | wc -l)
GO=/tmp/go $P .gpu/step.py imagenet100 $R/step50.json ${Z:---train.batch-size 256} > $R/step50.log 2>&1 & S=$!
setsid bash -c "TORCHINDUCTOR_CACHE_DIR=/tmp/in TRITON_CACHE_DIR=/tmp/tn timeout ${TL:-200} nice -n 5 $P -m pytest -p no:cacheprovider -v -rfE --durations 8 ${TK:-tests/kernels/test_reference.py tests/pipelines/test_gpu_views.py tests/method/test_cuda_graph.py tests/method/test_step.py tests/method/test_state.py} > $R/tests.log 2>&1" < /dev/null & T=$!
while kill -0 $S 2>/dev/null && ! grep -q ready $R/step50.log && [ $(t) -lt ${CUT:-90} ]; do sleep 0.3; done
echo ready $(t); pkill -STOP -f pytest; sleep 0.5; touch /tmp/go; wait $S; cp $R/step50* $OUT; echo step50 $(t)
${NCU:-ncu --clock-control none --set full -k regex:attend -s 2 -c 1 --csv --page raw} $P .gpu/loss.py 256 65536 > $R/ncu.csv 2> $R/ncu.err; echo ncu $(t)
timeout 55 $P .gpu/bench_gluon.py --output $R/gluon.json --seconds 36 $GL > $R/gluon.log 2>&1; echo gluon $(t)
pkill -CONT -f pytest; tar -C $R -czf $OUT/a.tar.gz .; tail -n 2 $R/step50.log | cut -c1-300; tail -n 9 $R/gluon.log | cut -c1-220; tail -n 3 $R/ncu.csv | cut -c1-200; grep -v nvjpeg $R/tests.log | tail -n 5 | cut -c1-160; echo end $(t)
