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

/* The sequence's WAL record and the relation's files changed names in 16. */
#if PG_VERSION_NUM >= 160000
#define SM_XL_SEQ_LOCATOR	locator
#define SM_RD_LOCATOR		rd_locator
#define SmRelLocator		RelFileLocator
#else
#define SM_XL_SEQ_LOCATOR	node
#define SM_RD_LOCATOR		rd_node
#define SmRelLocator		RelFileNode
#endif

/* The virtual transaction id moved into a struct of its own in 17. */
#if PG_VERSION_NUM >= 170000
#define SM_MY_LXID			(MyProc->vxid.lxid)
#define SM_LOCK_BACKEND(l)	((l)->vxid.procNumber)
#define SM_LOCK_LXID(l)		((l)->vxid.localTransactionId)
#else
#define SM_MY_LXID			(MyProc->lxid)
#define SM_LOCK_BACKEND(l)	((l)->backend)
#define SM_LOCK_LXID(l)		((l)->lxid)
#endif

/* BRIN's functions lost their snapshot in 17. */
#if PG_VERSION_NUM >= 170000
#define sm_brin_revmap(index, pages_per_range) brinRevmapInitialize(index, pages_per_range)
#define sm_brin_tuple(revmap, block, buffer, offset) \
	brinGetTupleForHeapBlock(revmap, block, buffer, offset, NULL, BUFFER_LOCK_SHARE)
#else
#define sm_brin_revmap(index, pages_per_range) brinRevmapInitialize(index, pages_per_range, NULL)
#define sm_brin_tuple(revmap, block, buffer, offset) \
	brinGetTupleForHeapBlock(revmap, block, buffer, offset, NULL, BUFFER_LOCK_SHARE, NULL)
#endif

/*
 * 15 has no public look-up of a setting's record; the record itself stays where
 * it is for the life of the process.
 */
#if PG_VERSION_NUM < 160000 && defined(GUC_TABLES_H)
static inline struct config_generic *
find_option(const char *name, bool create_placeholders, bool skip_errors, int elevel)
{
	struct config_generic **settings = get_guc_variables();

	for (int i = GetNumConfigOptions() - 1; i >= 0; i--)
		if (pg_strcasecmp(settings[i]->name, name) == 0)
			return settings[i];
	return NULL;
}
#endif

/* The JSON lexer's context may be the caller's since 17. */
#if PG_VERSION_NUM < 170000 && defined(JSONAPI_H)
#define makeJsonLexContextCstringLen(lex, json, len, encoding, need_escapes) \
	makeJsonLexContextCstringLen(unconstify(char *, (json)), (len), (encoding), (need_escapes))
#endif

/* Indexes that keep something between insertions came with 17. */
#if PG_VERSION_NUM < 170000
#define index_insert_cleanup(index, info) ((void) 0)
#endif

/* Rows other than the result relation's may be looked at again since 16. */
#if PG_VERSION_NUM < 160000 && defined(EXECUTOR_H)
#define EvalPlanQualInit(epqstate, parentestate, subplan, auxrowmarks, epqParam, resultRelations) \
	EvalPlanQualInit((epqstate), (parentestate), (subplan), (auxrowmarks), (epqParam))
#endif

/* Index scans may be instrumented since 18. */
#if PG_VERSION_NUM < 180000 && defined(GENAM_H)
#define index_beginscan(heapRelation, indexRelation, snapshot, instrument, nkeys, norderbys) \
	index_beginscan((heapRelation), (indexRelation), (snapshot), (nkeys), (norderbys))
#endif

/* Named wait events of extensions came with 17. */
#if PG_VERSION_NUM < 170000
#define WaitEventExtensionNew(name) PG_WAIT_EXTENSION
#endif

/* Invalid databases, left by an interrupted DROP DATABASE, came with 15.4. */
#if defined(PG_DATABASE_H) && !defined(DATCONNLIMIT_INVALID_DB)
#define database_is_invalid_form(form) false
#endif

/* Checks of ownership and privilege became one function for all classes in 16. */
#if PG_VERSION_NUM < 160000
#define object_ownercheck(classid, objectid, roleid) \
	(AssertMacro((classid) == DatabaseRelationId), \
	 pg_database_ownercheck(objectid, roleid))
#define object_aclcheck(classid, objectid, roleid, mode) \
	(AssertMacro((classid) == DatabaseRelationId), \
	 pg_database_aclcheck(objectid, roleid, mode))
#endif

/* Entries for a row that is new in all indexes: 16 brought a parameter for updates. */
#ifdef EXECUTOR_H
#if PG_VERSION_NUM >= 160000
#define sm_insert_index_tuples(target, slot, estate) \
	ExecInsertIndexTuples(target, slot, estate, false, false, NULL, NIL, false)
#else
#define sm_insert_index_tuples(target, slot, estate) \
	ExecInsertIndexTuples(target, slot, estate, false, false, NULL, NIL)
#endif
#endif

/* The mark of a function that does not return became a prefix in 18. */
#ifndef pg_noreturn
#define pg_noreturn pg_attribute_noreturn()
#endif

#endif							/* SM_COMPAT_H */
