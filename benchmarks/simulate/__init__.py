"""A simulation of the one loop: what throughput, idle shares and staleness will be, from step times.

The loop's own classes take part: `Buffer` and `StalenessBound`, `Admission`, and the routes of `oldlogits.sources`. Engine,
trainer and environments are replaced by models that only pass time, on an event loop whose clock jumps.
"""
