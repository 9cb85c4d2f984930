"""Training data: tokenised corpora, and exactly resumable streams of samples from them."""
