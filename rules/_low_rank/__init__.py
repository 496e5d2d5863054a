"""What every low-rank method shares: scaling, padding, swapping, slots, combination."""
