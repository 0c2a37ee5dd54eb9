# Softmobile for PostgreSQL.
#
# Two kinds of goals live here.  The goals below "machine goals" work on a fresh
# machine, before PostgreSQL is even installed; every other goal is plain PGXS
# (all, install, installcheck, clean), as PostgreSQL users expect.

MACHINE_GOALS = check demo bench chaos deps lint fuzz
EXTVERSION = $(shell sed -n "s/^default_version *= *'\(.*\)'/\1/p" softmobile.control)

ifneq ($(filter $(MACHINE_GOALS),$(MAKECMDGOALS)),)

.PHONY: $(MACHINE_GOALS)

# Install what building and testing need (Debian, as root); says nothing when all is there.
deps:
	@test/tools/deps

# All tests: regression, isolation, pgTAP, TAP.
check: deps
	@test/tools/check

# The main job, shown: sell, lose the link, sell on, reconnect, compare.
demo: deps
	@test/tools/demo

# Everything breaks while a shop sells; nothing may be lost: SEED=, FAULTS=, MINUTES= (doc/reliability.md).
chaos: deps
	@test/tools/chaos

# The figures of doc/performance.md.
bench: deps
	@test/tools/bench

# Warnings of gcc and clang, cppcheck, clang-tidy, formatting.
lint: deps
	@test/tools/lint

# Fuzzers of receipts, of batches and of the gateway's input, each for SECONDS, or EXECUTIONS if these are over first.
fuzz: deps
	@test/tools/fuzz "$(or $(SECONDS),60)" "$(or $(EXECUTIONS),-1)"

else

EXTENSION = softmobile
MODULE_big = softmobile
OBJS = $(patsubst %.c,%.o,$(sort $(wildcard src/*.c)))
DATA_built = softmobile--$(EXTVERSION).sql
DATA = $(filter-out $(DATA_built),$(wildcard softmobile--*--*.sql))
PG_CPPFLAGS = -Isrc -DSOFTMOBILE_VERSION='"$(EXTVERSION)"' $(shell curl-config --cflags)
PG_CFLAGS = -Wall -Wextra -Wno-unused-parameter -Wno-sign-compare -Wno-missing-field-initializers $(WERROR)
SHLIB_LINK = $(shell curl-config --libs) -lz
EXTRA_CLEAN = softmobile--$(EXTVERSION).sql softmobile-gateway $(GATEWAY_OBJS)

GATEWAY_OBJS = $(patsubst %.c,%.o,$(sort $(wildcard src/central/*.c)))
SCRIPTS_built = softmobile-gateway

REGRESS = $(patsubst sql/%.sql,%,$(sort $(wildcard sql/*.sql)))
ISOLATION = $(patsubst test/isolation/specs/%.spec,%,$(sort $(wildcard test/isolation/specs/*.spec)))
ISOLATION_OPTS = --inputdir=test/isolation --outputdir=output_iso
TAP_TESTS = 1
PROVE_TESTS = $(sort $(wildcard test/t/*.pl))

PG_CONFIG ?= pg_config
PGXS := $(shell $(PG_CONFIG) --pgxs)
include $(PGXS)

# PGXS tracks headers only where PostgreSQL was configured with --enable-depend.
$(OBJS): $(wildcard src/*.h)

softmobile--$(EXTVERSION).sql: $(sort $(wildcard sql/install/*.sql)) softmobile.control
	cat $(filter %.sql,$^) > $@

# The central gateway is an ordinary program: libmicrohttpd in front, libpq behind.
softmobile-gateway: $(GATEWAY_OBJS)
	$(CC) $(CFLAGS) $(LDFLAGS) -o $@ $^ -L$(shell $(PG_CONFIG) --libdir) -lpq -lmicrohttpd -ljansson -lz -lcrypto -lpthread

$(GATEWAY_OBJS): $(wildcard src/central/*.h)
$(GATEWAY_OBJS): CPPFLAGS += -I$(shell $(PG_CONFIG) --includedir)

endif
