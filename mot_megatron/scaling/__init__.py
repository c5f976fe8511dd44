"""What layouts cost: measured on this machine's ranks, or told in closed form for any number."""
