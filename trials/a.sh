. .gpu/setup.sh; P=${P:-python3}; mkdir -p /tmp/r; rm -rf /tmp/tree; cp -r $PWD /tmp/tree; cd /tmp/tree; export PYTHONPATH=/tmp/tree:/tmp/site TORCHINDUCTOR_COMPILE_THREADS=3 OMP_NUM_THREADS=2 RECO_FAST_TEST_DATA=/nowhere
bg() { setsid nohup nice -n 5 timeout $1 "${@:3}" > /tmp/r/$2.log 2>&1 < /dev/null & }
bg 100 tests-method $P -m pytest -p no:cacheprovider -v -rs --durations 5 tests/method/test_cuda_graph.py tests/method/test_step.py -k "captured_step or leave_each_other or found_before or compiled_step_waits"
bg 100 tests-views $P -m pytest -p no:cacheprovider -v -rs --durations 5 tests/pipelines/test_gpu_views.py -k "not each_operation"
TORCHINDUCTOR_CACHE_DIR=/tmp/in TRITON_CACHE_DIR=/tmp/tn bg 100 norms $P .gpu/norms.py
sleep ${NAP:-2}; ls /tmp/site | wc -l
