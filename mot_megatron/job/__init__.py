"""Job control: joining the world, the watchdog over ranks, stop requests, and hardware."""
