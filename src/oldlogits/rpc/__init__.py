"""One way to call a method of an object in another process: a typed client made from a Protocol, over any transport."""
