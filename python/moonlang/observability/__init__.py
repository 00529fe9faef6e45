"""What an operator sees: metrics under SGLang's names."""
