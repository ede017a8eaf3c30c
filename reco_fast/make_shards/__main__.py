from reco_fast.make_shards import main

main()
