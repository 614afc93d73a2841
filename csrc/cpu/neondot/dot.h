#pragma once

#define CG_DOT_FOURS
#include "../neon/dot.h"
