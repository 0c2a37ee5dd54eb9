/*
 * compat.h
 *		The only place that tests versions of PostgreSQL and libcurl.
 *
 * Wrappers carry the name of the newest server's function, so that a version
 * can be dropped by deleting its branch here.
 */
#ifndef SM_COMPAT_H
#define SM_COMPAT_H

#if PG_VERSION_NUM < 150000
#error "softmobile needs PostgreSQL 15 or later"
#endif

#endif							/* SM_COMPAT_H */
