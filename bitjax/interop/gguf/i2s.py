"""placeholder"""
def detect(file, config):
    raise ValueError("ask")
