"""What a process's memory consists of, in the words of plans, metrics and the monitor."""

# Key of the metrics → what tables call it.
HELD = {
    "parameters": "parameters",
    "gradients": "gradients",
    "buffers": "buffers",
    "optimizer_state": "optimizer state",
}
PASSING = {
    "unsharded": "unsharded units and their gradients",
    "scratch": "scratch",
}
ROWS = HELD | PASSING
PEAK, REST = "peak", "rest"
