"""One update beside what people would use instead, and what exactness costs in it."""
