# shared.sh COMMAND...: with a share of the machine's lock
exec 9>>/tmp/machine.lock; flock -s 9; export RECO_FAST_MACHINE=9 TORCHINDUCTOR_COMPILE_THREADS=4; exec "$@"
