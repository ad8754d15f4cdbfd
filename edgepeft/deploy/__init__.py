"""Where a bundle goes: targets, the compiler, the emulated boards, and the bundle itself."""
