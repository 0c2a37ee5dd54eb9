/*
 * compat.h
 *		The only place that tests versions of PostgreSQL and libcurl.
 *
 * Wrappers carry the name of the newest server's function, so that a version
 * can be dropped by deleting its branch here.
 */
#ifndef SM_COMPAT_H
#define SM_COMPAT_H

/*
 * libcurl: only for a file that has included curl.h before.  7.85 brought
 * CURLOPT_PROTOCOLS_STR.
 */
#ifdef LIBCURL_VERSION_NUM
#if LIBCURL_VERSION_NUM < 0x075500
#error "softmobile needs libcurl 7.85 or later"
#endif

/*
 * Without it a handle that is removed while its name look-up hangs waits for
 * the look-up, which can be minutes.  Nothing replaces it before 7.87.
 */
#if LIBCURL_VERSION_NUM >= 0x075700
#define sm_curl_quick_exit(easy) curl_easy_setopt(easy, CURLOPT_QUICK_EXIT, 1L)
#else
#define sm_curl_quick_exit(easy) CURLE_OK
#endif

/*
 * libcurl would keep the trusted certificates in memory for a day and not see
 * that the file has been replaced.  Before 7.87 it reads the file each time.
 */
#if LIBCURL_VERSION_NUM >= 0x075700
#define sm_curl_no_ca_cache(easy) curl_easy_setopt(easy, CURLOPT_CA_CACHE_TIMEOUT, 0L)
#else
#define sm_curl_no_ca_cache(easy) CURLE_OK
#endif
#endif							/* LIBCURL_VERSION_NUM */

#if PG_VERSION_NUM < 150000
#error "softmobile needs PostgreSQL 15 or later"
#endif

#endif							/* SM_COMPAT_H */
