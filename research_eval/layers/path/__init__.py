"""The parts of `goe_original`: one file per mechanism, each with its options, buffers, schedule and losses."""
