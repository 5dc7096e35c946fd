"""One folder an op: the public function, its reference, and its kernels."""
