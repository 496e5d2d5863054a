"""The base of low-rank methods: scaling, padding, hot-swapping, slots, combination."""
