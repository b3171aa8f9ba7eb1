"""The process group, sharding, gradient averaging, and a watchdog for hangs."""
