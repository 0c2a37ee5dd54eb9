/*
 * uuid7.h
 *		UUIDs of version 7 (RFC 9562): the identity of an event from its birth.
 */
#ifndef SM_UUID7_H
#define SM_UUID7_H

#include "datatype/timestamp.h"
#include "utils/uuid.h"

extern void sm_uuid7_generate(TimestampTz now, pg_uuid_t *id);
pg_nodiscard extern bool sm_uuid7_read(const char *text, int len, pg_uuid_t *id);

#endif							/* SM_UUID7_H */
