// The loops, on raw pointers, for whichever pack the including file chose. The maths is in ../math; here is what runs it
// over tensors.
#include "blocks.inl"
#include "forward.inl"
#include "sums.inl"
#include "backward.inl"
#include "slopes.inl"
