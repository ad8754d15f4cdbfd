"""Weight formats: how a frozen weight is stored in 4 or 8 bits, and the layers that compute on it."""
