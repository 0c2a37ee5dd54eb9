/*
 * uuid7.c
 *		UUIDs of version 7 (RFC 9562): 48 bits of milliseconds, 12 bits of the
 *		fraction below (section 6.2, method 3), 62 random bits; and UUIDs read from text.
 *
 * sm_uuid7_generate() is called for every event; random bytes are drawn in bulk, per
 * process (a process that was forked from one with bytes left would repeat
 * them, so the postmaster must never draw any: it captures nothing).
 */
#include "postgres.h"

#include <ctype.h>

#include "port/pg_bswap.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"
#include "uuid7.h"

#define POOL_BYTES	2048

static uint8 pool[POOL_BYTES];
static int	pool_left = 0;

static const uint8 *
random_bytes(int n)
{
	if (pool_left < n)
	{
		if (!pg_strong_random(pool, sizeof(pool)))
			ereport(ERROR,
					(errcode(ERRCODE_INTERNAL_ERROR),
					 errmsg("could not generate random values")));
		pool_left = sizeof(pool);
	}
	pool_left -= n;
	return pool + pool_left;
}

void
sm_uuid7_generate(TimestampTz now, pg_uuid_t *id)
{
	uint64		us = now + (POSTGRES_EPOCH_JDATE - UNIX_EPOCH_JDATE) * USECS_PER_DAY;
	uint64		ms = us / 1000;
	uint64		fraction = (us % 1000) * 4096 / 1000;
	uint64		high = pg_hton64(ms << 16 | UINT64CONST(0x7) << 12 | fraction);

	memcpy(id->data, &high, 8);
	memcpy(id->data + 8, random_bytes(8), 8);
	id->data[8] = (id->data[8] & 0x3f) | 0x80;
}

/* Any UUID in its usual form, 36 characters; false: it is none. */
bool
sm_uuid7_read(const char *text, int len, pg_uuid_t *id)
{
	char		hex[2 * UUID_LEN];
	int			n = 0;

	if (len != 36)
		return false;
	for (int i = 0; i < 36; i++)
	{
		if (i == 8 || i == 13 || i == 18 || i == 23)
		{
			if (text[i] != '-')
				return false;
		}
		else if (!isxdigit((unsigned char) text[i]))
			return false;
		else
			hex[n++] = text[i];
	}
	hex_decode(hex, sizeof(hex), (char *) id->data);
	return true;
}
