"""What a frame costs on this machine, beside the least it could cost: a made dump, floors, and the flow itself."""
