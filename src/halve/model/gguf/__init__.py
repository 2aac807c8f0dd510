"""What model lies in a GGUF file? Its config, its tokenizer, its tensors, and the folder that is made of it once."""
