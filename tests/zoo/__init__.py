"""A zoo of real models: each is planned with no hints, converted and checked."""
