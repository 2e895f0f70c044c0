"""Where examples come from: sources with random access, and a loader that turns them into batches (NHWC, [-1, 1])."""
