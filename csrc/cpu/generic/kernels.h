// The loops, on raw pointers, for whichever vector the including file chose. The maths is in ../math; here is what runs it
// over tensors.
#include "blocks.h"
#include "forward.h"
#include "sums.h"
#include "backward.h"
#include "slopes.h"
